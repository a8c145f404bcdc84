"""`python -m megatron_spo` is `megatron-spo`."""

if __name__ == "__main__":  # processes that save checkpoints import this module again
    import sys

    from megatron_spo.cli import main

    sys.exit(main())
