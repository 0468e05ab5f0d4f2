import { describe, expect, it } from 'vitest';
import {
  allCaptionTexts,
  BACKGROUNDS,
  canonicalPrompt,
  caption,
  STYLE_WORDS,
  TEMPLATES,
} from '../../models/small/data/captions.ts';
import { OBJECTS, type PictureObject } from '../../models/small/data/objects.ts';
import { STYLES } from '../../models/small/data/pictures.ts';

const object = (name: string): PictureObject => OBJECTS.find((candidate) => candidate.name === name)!;
const background = (name: string) => BACKGROUNDS.find((candidate) => candidate.name === name)!;
/** A generator that picks the template with this index. */
const template = (index: number) => () => (index + 0.5) / TEMPLATES.length;

describe('captions', () => {
  it('name the style, the object and the background in each phrasing', () => {
    for (let index = 0; index < TEMPLATES.length; index++) {
      const text = caption(object('palm tree'), 'gradient', background('orange'), template(index));
      expect(text).toContain('glossy');
      expect(text).toContain('palm tree');
      expect(text).toContain('orange');
      expect(text).not.toMatch(/[{}]|undefined/);
    }
  });

  it('put the article that the sound asks for, and none before plurals', () => {
    const icon = (name: string) => caption(object(name), 'flat', background('red'), template(5));
    expect(icon('apple')).toBe('flat icon of an apple, red background');
    expect(icon('unicorn')).toBe('flat icon of a unicorn, red background');
    expect(icon('umbrella')).toBe('flat icon of an umbrella, red background');
    expect(icon('hourglass')).toBe('flat icon of an hourglass, red background');
    expect(icon('horse')).toBe('flat icon of a horse, red background');
    expect(icon('cherries')).toBe('flat icon of cherries, red background');
    expect(caption(object('cherries'), 'flat', background('orange'), template(1))).toBe(
      'flat cherries on an orange background',
    );
  });

  it('have at most eleven words', () => {
    const lengths = OBJECTS.flatMap((named) =>
      TEMPLATES.map((_, index) => caption(named, 'noto', background('orange'), template(index)).split(' ').length),
    );
    expect(Math.max(...lengths)).toBeLessThanOrEqual(11);
  });

  it('follow the generator alone', () => {
    const texts = [0, 0.3, 0.999999].map((value) => caption(object('fox'), '3d', background('blue'), () => value));
    expect(texts).toEqual(
      [0, 0.3, 0.999999].map((value) => caption(object('fox'), '3d', background('blue'), () => value)),
    );
    expect(new Set(texts).size).toBe(3);
  });

  it('have one plain phrasing', () => {
    expect(canonicalPrompt(object('fox'), '3d', background('teal'))).toBe('3d fox on a teal background');
  });
});

describe('allCaptionTexts', () => {
  const words = (text: string) => text.split(/[ ,]+/);

  it('holds every word that a caption can have', () => {
    const known = new Set(allCaptionTexts().flatMap(words));
    const possible = OBJECTS.flatMap((named) =>
      STYLES.flatMap((style) =>
        TEMPLATES.flatMap((_, index) => words(caption(named, style, BACKGROUNDS[index]!, template(index)))),
      ),
    );
    const needed = new Set([...possible, ...BACKGROUNDS.map(({ name }) => name), ...Object.values(STYLE_WORDS)]);
    expect([...needed].filter((word) => !known.has(word))).toEqual([]);
  });

  it('gives the same texts each time', () => {
    expect(allCaptionTexts()).toEqual(allCaptionTexts());
  });
});
