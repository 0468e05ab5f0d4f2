/**
 * What the small model's captions say: a style, an object and a plain background.
 *
 * A caption is made anew each time a picture is shown in training, from one of a handful of phrasings, so that the
 * model doesn't depend on the order of the words. The words for the styles are what a person might type, not the names
 * of the picture sets.
 */
import { OBJECTS, type PictureObject } from './objects.ts';
import { STYLES, type Style } from './pictures.ts';

/** A number in [0, 1), from a seeded generator so that training can be repeated. */
export type Random = () => number;

/** How prompts call the styles: the Fluent sets in 3D, with gradients and flat, and Noto, which has drawn outlines. */
export const STYLE_WORDS: Readonly<Record<Style, string>> = {
  '3d': '3d',
  gradient: 'glossy',
  flat: 'flat',
  noto: 'cartoon',
};

export interface Background {
  readonly name: string;
  /** Red, green, blue, 0 to 255. */
  readonly rgb: readonly [number, number, number];
}

/**
 * The backgrounds. Clear of each other, and softer than the pure colours of the screen so that an object of the same
 * colour still shows on them.
 */
export const BACKGROUNDS: readonly Background[] = [
  { name: 'white', rgb: [255, 255, 255] },
  { name: 'black', rgb: [16, 16, 18] },
  { name: 'gray', rgb: [150, 152, 156] },
  { name: 'red', rgb: [208, 44, 48] },
  { name: 'orange', rgb: [246, 142, 38] },
  { name: 'yellow', rgb: [252, 220, 80] },
  { name: 'green', rgb: [60, 150, 72] },
  { name: 'teal', rgb: [34, 158, 160] },
  { name: 'blue', rgb: [48, 100, 214] },
  { name: 'purple', rgb: [122, 66, 180] },
  { name: 'pink', rgb: [248, 170, 200] },
  { name: 'brown', rgb: [118, 76, 48] },
];

/**
 * The phrasings, at most 11 words with the longest names. {a object} has an article where the name takes one, {a style}
 * the article of its style word.
 */
export const TEMPLATES = [
  '{style} {object} on {a colour} background',
  '{a style} {object} on {a colour} background',
  '{a object} in {style} style on {a colour} background',
  '{a object} on {a colour} background, {style} style',
  '{a colour} background with {a object}, {style} style',
  '{style} icon of {a object}, {colour} background',
  '{a object}, {style}, {colour} background',
  '{object}, {style}, {colour}',
] as const;

/** The one phrasing of sheets and measurements. */
const CANONICAL_TEMPLATE = TEMPLATES[0];

/** By sound: an hourglass, a unicorn. */
const withArticle = (words: string): string => `${/^([aeio]|u(?!ni)|hour)/.test(words) ? 'an' : 'a'} ${words}`;

function fill(template: string, object: PictureObject, style: Style, background: Background): string {
  const words: Record<string, string> = {
    style: STYLE_WORDS[style],
    'a style': object.bare ? STYLE_WORDS[style] : withArticle(STYLE_WORDS[style]),
    object: object.name,
    'a object': object.bare ? object.name : withArticle(object.name),
    colour: background.name,
    'a colour': withArticle(background.name),
  };
  return template.replace(/\{([^}]+)\}/g, (_, slot: string) => words[slot]!);
}

/** A caption in one of the phrasings, each as likely as the others. */
export function caption(object: PictureObject, style: Style, background: Background, random: Random): string {
  const template = TEMPLATES[Math.floor(random() * TEMPLATES.length)]!;
  return fill(template, object, style, background);
}

/** Every phrasing as a line of a caption file, with `{colour}` and `{a colour}` left for the background. */
export function captionLines(object: PictureObject, style: Style): string[] {
  const blank: Background = { name: '{colour}', rgb: [0, 0, 0] };
  return TEMPLATES.map((template) => fill(template, object, style, blank).replace(/an? \{colour\}/g, '{a colour}'));
}

/** What stands for `{colour}` and `{a colour}` over a background. */
export function backgroundWords({ name }: Background): Record<string, string> {
  return { colour: name, 'a colour': withArticle(name) };
}

/** The caption in its plain phrasing: "flat fox on a teal background". */
export function canonicalPrompt(object: PictureObject, style: Style, background: Background): string {
  return fill(CANONICAL_TEMPLATE, object, style, background);
}

/**
 * Text to train the tokenizers on: every object in every phrasing, with the styles and backgrounds taking turns so that
 * every word of every caption occurs, always in the same order.
 */
export function allCaptionTexts(): string[] {
  return OBJECTS.flatMap((object, objectIndex) =>
    TEMPLATES.map((template, templateIndex) => {
      const style = STYLES[(objectIndex + templateIndex) % STYLES.length]!;
      const background = BACKGROUNDS[(objectIndex * TEMPLATES.length + templateIndex) % BACKGROUNDS.length]!;
      return fill(template, object, style, background);
    }),
  );
}
