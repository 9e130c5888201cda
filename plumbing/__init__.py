"""What every training program needs and the paper never mentions: settings, batches, logs, saved
runs, checkpoints of others, several processes, memory. Nothing here imports the root scripts."""
