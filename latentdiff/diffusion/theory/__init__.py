"""Diffusion beyond the discrete chain: continuous time, learned schedules, progressive coding."""
