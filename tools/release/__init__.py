"""Prepares the release of one package: version, changelog, wheel and source distribution, checks. Publishes nothing."""
