"""The parts of the page, each a pure function from the record to sections."""
