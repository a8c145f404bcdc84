"""What a run needs, before a GPU is touched: memory by part, time and cost, and which layouts fit. No torch."""
