"""Offline reinforcement learning with policies whose memory is a State; see docs/rl.md."""
