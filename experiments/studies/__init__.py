"""Studies of reinforcement learning: values, the processes that run them, and the page of results."""
