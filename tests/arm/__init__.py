"""Code for ARM, run for real: by user-mode emulation where the machine is another one."""
