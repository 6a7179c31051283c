"""What a training run will take, before anything is allocated: `jlora.plan`."""
