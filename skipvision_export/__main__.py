"""`python -m skipvision_export`, which is what `accelerate launch -m` runs."""

from skipvision_export.cli import main

if __name__ == "__main__":
    main()
