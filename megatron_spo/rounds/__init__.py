"""Round after round: sample answers from the model, make pairs of them, train on the pairs, and start again."""
