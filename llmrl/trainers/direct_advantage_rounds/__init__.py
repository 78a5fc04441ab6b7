"""The rounds of Direct Advantage (`trainers/direct_advantage.py`): what happens in each, and the files that it leaves.

rounds        the stages in their order; stages: what they make of one another's files, no model is asked there
critic        the value head's model, trained apart
stage_files   long work in stages, each of which leaves a file
"""
