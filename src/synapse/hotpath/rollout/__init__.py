"""How a build of a kernel comes to answer calls, and who decides it."""
