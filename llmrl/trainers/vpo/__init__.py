"""VPO: `offline` and `online` are its loops; `online_config` and `rounds` are parts of the second, `calibration` of
both."""
