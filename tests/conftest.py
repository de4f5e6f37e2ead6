"""Tests run in a process set up as the commands set theirs up: the same allocator, the same compiler flags, the same bits."""

from research.process import set_allocator, set_dispatch, set_xla_flags

set_allocator()
set_dispatch()
set_xla_flags()
