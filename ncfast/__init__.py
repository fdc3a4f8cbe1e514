"""ncfast"""
