"""The algorithm, pure: no I/O, no clock, no asyncio, no global random numbers; standard library and numpy only."""
