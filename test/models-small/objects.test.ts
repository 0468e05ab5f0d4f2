import { describe, expect, it } from 'vitest';
import { BACKGROUNDS, STYLE_WORDS } from '../../models/small/data/captions.ts';
import { OBJECTS } from '../../models/small/data/objects.ts';

describe('the objects of the small model', () => {
  it('are a couple of hundred, each name and each emoji once', () => {
    expect(OBJECTS.length).toBeGreaterThanOrEqual(200);
    expect(new Set(OBJECTS.map(({ name }) => name)).size).toBe(OBJECTS.length);
    expect(new Set(OBJECTS.map(({ codepoints }) => codepoints)).size).toBe(OBJECTS.length);
  });

  it('have names of one to three lower-case words', () => {
    for (const { name } of OBJECTS) expect(name).toMatch(/^[a-z]+( [a-z]+){0,2}$/);
  });

  it('use no word that names a background or a style', () => {
    const taken = new Set([...BACKGROUNDS.map(({ name }) => name), ...Object.values(STYLE_WORDS)]);
    const clashes = OBJECTS.filter(({ name }) => name.split(' ').some((word) => taken.has(word)));
    expect(clashes).toEqual([]);
  });

  it('mark plurals and mass nouns as taking no article', () => {
    const bare = OBJECTS.filter((object) => object.bare).map(({ name }) => name);
    expect(bare).toEqual(expect.arrayContaining(['cherries', 'scissors', 'bread']));
    expect(bare).not.toContain('fox');
  });
});
