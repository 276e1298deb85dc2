def run(rng, seconds):
    raise NotImplementedError
