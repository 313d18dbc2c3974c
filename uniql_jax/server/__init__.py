"""An HTTP server for one elastic checkpoint: OpenAI's completion calls, a page, the prune rate as a live setting."""
