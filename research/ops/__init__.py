"""Pure array functions without parameters: each has a reference implementation and faster implementations, chosen by
platform and shape."""
