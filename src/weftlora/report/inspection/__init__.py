"""The page of an inspection: parts that are pure functions from the record to sections."""
