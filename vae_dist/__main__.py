"""`python -m vae_dist` is `vae-dist`."""

from vae_dist.cli import main

raise SystemExit(main())
