import { describe, expect, it } from 'vitest';
import { BACKGROUNDS, STYLE_WORDS } from '../../models/small/data/captions.ts';
import { ALL_OBJECTS } from '../../models/small/data/objects.ts';

describe('the objects of the small model', () => {
  it('are a couple of hundred, each name and each emoji once', () => {
    expect(ALL_OBJECTS.length).toBeGreaterThanOrEqual(200);
    expect(new Set(ALL_OBJECTS.map(({ name }) => name)).size).toBe(ALL_OBJECTS.length);
    expect(new Set(ALL_OBJECTS.map(({ codepoints }) => codepoints)).size).toBe(ALL_OBJECTS.length);
  });

  it('have names of one to three lower-case words', () => {
    for (const { name } of ALL_OBJECTS) expect(name).toMatch(/^[a-z]+( [a-z]+){0,2}$/);
  });

  it('use no word that names a background or a style', () => {
    const taken = new Set([...BACKGROUNDS.map(({ name }) => name), ...Object.values(STYLE_WORDS)]);
    const clashes = ALL_OBJECTS.filter(({ name }) => name.split(' ').some((word) => taken.has(word)));
    expect(clashes).toEqual([]);
  });

  it('mark plurals and mass nouns as taking no article', () => {
    const bare = ALL_OBJECTS.filter((object) => object.bare).map(({ name }) => name);
    expect(bare).toEqual(expect.arrayContaining(['cherries', 'scissors', 'bread']));
    expect(bare).not.toContain('fox');
  });
});
