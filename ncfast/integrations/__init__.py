"""ncfast inside other libraries: import the module of the one you have; ncfast itself imports none."""
