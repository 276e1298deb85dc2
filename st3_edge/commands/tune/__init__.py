"""`st3-edge tune`: the cheapest schedule that leaves a model's answers nearly as they were. docs/tune.md says how."""
