"""Training and examining models that see and draw, as Janus and Janus-Pro were trained.

Papers: Janus (arXiv:2410.13848), Janus-Pro (arXiv:2501.17811). One model reads three kinds of rows,
text, questions about pictures and pictures to draw, in fixed ratios.
"""
