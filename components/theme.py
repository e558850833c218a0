"""How the page looks: Gradio theme, our style sheet, and the head that keeps foreign content out."""

from __future__ import annotations

from pathlib import Path

import gradio as gr

from components import figures

ASSETS = Path(__file__).parent.parent / "assets"
_SHEETS = (ASSETS / "style.css", ASSETS / "chat.css", ASSETS / "evaluate.css")

# A model's text may hold pictures, films, styles and forms; the browser must not fetch or post anything for it. What the page
# itself needs comes from its own address; it runs scripts and styles that stand in it, as Gradio's pages do.
_OWN = "'self' data: blob:"
_POLICY = "; ".join((
    f"default-src {_OWN} 'unsafe-inline' 'unsafe-eval'", "script-src 'self' blob: 'unsafe-inline' 'unsafe-eval'",
    f"connect-src {_OWN}", f"img-src {_OWN}", f"media-src {_OWN}", f"font-src {_OWN}", f"style-src {_OWN} 'unsafe-inline'",
    "frame-src 'none'", "object-src 'none'", "base-uri 'self'", "form-action 'self'"))
HEAD = f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n' \
       '<meta name="viewport" content="width=device-width, initial-scale=1">'


def css() -> str:
    """The style sheets of the page, read from assets."""
    return "\n".join([*(path.read_text(encoding="utf-8") for path in _SHEETS), figures.CSS])


def theme() -> gr.themes.Base:
    """One accent on slate, white cards, and only fonts that Gradio ships complete."""
    sans, mono = gr.themes.LocalFont("IBM Plex Sans", weights=(400, 700)), gr.themes.LocalFont("IBM Plex Mono", weights=(400, 700))
    return gr.themes.Default(
        primary_hue="indigo", secondary_hue="indigo", neutral_hue="slate", radius_size="lg",
        font=(sans, "ui-sans-serif", "system-ui", "sans-serif"), font_mono=(mono, "ui-monospace", "monospace"),
    ).set(
        body_background_fill="*neutral_50", body_background_fill_dark="*neutral_950",
        block_background_fill="white", block_background_fill_dark="*neutral_900",
        block_border_color="*neutral_200", block_border_color_dark="*neutral_800",
        block_shadow="0 1px 3px rgb(15 23 42 / .06)", block_shadow_dark="none",
        block_title_text_weight="600", block_label_text_weight="600",
        block_title_text_color="*neutral_700", block_title_text_color_dark="*neutral_200",
        button_large_text_weight="600", button_medium_text_weight="600", button_border_width="1px",
        button_primary_background_fill="*primary_600", button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_dark="*primary_600", button_primary_background_fill_hover_dark="*primary_500",
        button_primary_text_color="white", button_primary_text_color_dark="white",
        button_secondary_background_fill="white", button_secondary_background_fill_hover="*neutral_100",
        button_secondary_background_fill_dark="*neutral_800",
        button_secondary_border_color="*neutral_300", button_secondary_border_color_dark="*neutral_700",
        button_secondary_text_color="*neutral_800", button_secondary_text_color_dark="*neutral_100",
        body_text_color_subdued="*neutral_600", body_text_color_subdued_dark="*neutral_400",
        block_info_text_color="*neutral_600", block_info_text_color_dark="*neutral_400",
        input_background_fill="white", input_background_fill_dark="*neutral_950",
        input_border_color="*neutral_300", input_border_color_dark="*neutral_700", layout_gap="14px",
        checkbox_border_color="*neutral_400", checkbox_border_color_dark="*neutral_500",
    )
