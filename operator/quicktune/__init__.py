"""The public Python entry of Quick-Tune: a thin façade over `qtt_core` and `qtt_operator`.

Reserved: its names (`QuickTuner`, `get_pretrained_optimizer`) arrive with the pretrained ones.
"""
