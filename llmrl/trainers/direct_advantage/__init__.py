"""Direct Advantage: `method` is its loop, `config` its keys; the others are what happens in a round.

rounds        the stages in their order; stages: what they make of one another's files, no model is asked there
critic        the value head's model, trained apart
stage_files   long work in stages, each of which leaves a file
"""
