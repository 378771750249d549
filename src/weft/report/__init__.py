"""Looking inside an adapter: what was measured (`result`), how (`inspecting` and below), and how it is shown (`page`)."""
