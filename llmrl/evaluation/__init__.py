"""How good a model is: accuracy on tasks, preference accuracy, and how sure one can be of either."""
