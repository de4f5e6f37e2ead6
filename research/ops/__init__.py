"""Pure array functions without parameters: each has a reference implementation and faster forms, chosen by platform and
shape."""
