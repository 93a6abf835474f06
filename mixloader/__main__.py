"""`python -m mixloader <verb>`."""

from mixloader.cli import main

raise SystemExit(main())
