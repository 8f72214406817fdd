"""The commands of ``fastsskd``, one file each: ``add`` describes its arguments, ``run`` does it."""
