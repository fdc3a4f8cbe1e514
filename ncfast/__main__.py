"""`python -m ncfast`: see `ncfast.cli`."""

from ncfast.cli import main

raise SystemExit(main())
