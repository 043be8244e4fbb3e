"""Flow and diffusion policies for Stable-Baselines3."""
