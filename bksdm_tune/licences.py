"""Which licence covers what; the README and every model card quote these texts."""

from __future__ import annotations

CODE_LICENCE = "Apache-2.0"
POCKET_LICENCE = "Apache-2.0"
OPENRAIL_LICENCE = "CreativeML OpenRAIL-M"
# The name of the licence in a Hugging Face model card's header.
OPENRAIL_HUB_ID = "creativeml-openrail-m"
OPENRAIL_URL = "https://huggingface.co/spaces/CompVis/stable-diffusion-license"

OPENRAIL_NOTICE = f"""\
The weights of Stable Diffusion and BK-SDM, and every model or adapter tuned or distilled from \
them, are under the {OPENRAIL_LICENCE} licence ({OPENRAIL_URL}). You may use, change and share \
them, also commercially, provided that you pass on the same use restrictions (Attachment A of the \
licence: among others no unlawful use, no harm to minors, no defamation or harassment, no false \
information made to harm others) and a copy of the licence, and say what you changed."""

POCKET_NOTICE = f"""\
The weights of the pocket family were trained from nothing on pictures drawn by this project and, \
for the VAE, on photos named in its card; they contain no Stable Diffusion weights and are under \
{POCKET_LICENCE}, as is what is tuned from them."""

CODE_NOTICE = f"The code is under {CODE_LICENCE}; see LICENSE."
