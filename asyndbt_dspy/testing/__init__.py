"""For tests of the package and of engines that others write: conformance suite, toy problems with known optimum."""
