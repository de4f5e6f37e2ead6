"""Pure array functions without parameters: each has a naive twin and faster forms, chosen by platform and shape."""
