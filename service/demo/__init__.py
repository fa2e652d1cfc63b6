"""The embedded demo model: its folder `model/` and the recipe that made it. The command line serves it by default."""
