"""The page of a service: what is inspected now, thresholds, settings that move, quality, and training.

Made with NiceGUI, which brings all that a browser needs, so that it works without internet.
"""

from flawmap.service.page.mounting import mount_page

__all__ = ["mount_page"]
