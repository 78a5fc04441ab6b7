"""The credit map: what a model trained by preferences says of the single tokens of an answer.

Rafailov et al., "From r to Q*", arXiv 2404.12358: of a DPO policy beta (log pi - log pi_ref) of a token is its optimal
advantage, up to a potential of the state (docs/methods/dpo.md).

    model = CreditModel.load("runs/dpo-tiny/final", "starter")
    ((chosen, rejected),) = model.credits([Question(prompt, (right_answer, wrong_answer))])
    chosen.rewards, chosen.spans, chosen.steps()
"""
