"""`python -m parity_tests report`: is this checkpoint the same function here and in PyTorch?"""
