"""Looking inside one adapter: everything that can be measured of it, as a record."""
