"""From a composed configuration to a trained model: set-up, the loop, its state, the plan."""
