"""DreamBooth: teach a backbone one subject from a few photos."""
