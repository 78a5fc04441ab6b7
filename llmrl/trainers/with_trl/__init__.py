"""The methods that TRL trains (sft, reward): `bridge` is where TRL comes in, `session` what surrounds its steps,
`supervised` the arithmetic of their batches."""
