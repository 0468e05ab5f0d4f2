import { describe, expect, it } from 'vitest';
import { BACKGROUNDS, canonicalPrompt } from '../../models/small/data/captions.ts';
import { HELD_OUT, isHeldOut, SHEET, SHEET_COLUMNS, trainingPairs } from '../../models/small/data/held-out.ts';
import { OBJECTS } from '../../models/small/data/objects.ts';
import { STYLES } from '../../models/small/data/pictures.ts';

describe('held-out pairs', () => {
  it('are sixteen: four in each style, of sixteen objects that exist', () => {
    const names = STYLES.flatMap((style) => HELD_OUT[style]);
    expect(STYLES.map((style) => HELD_OUT[style].length)).toEqual([4, 4, 4, 4]);
    expect(new Set(names).size).toBe(16);
    expect(names.filter((name) => !OBJECTS.some((object) => object.name === name))).toEqual([]);
  });

  it('are the only pairs that training lacks', () => {
    const pairs = trainingPairs();
    expect(pairs).toHaveLength(OBJECTS.length * STYLES.length - 16);
    expect(
      pairs.filter(({ objectIndex, styleIndex }) => isHeldOut(OBJECTS[objectIndex]!, STYLES[styleIndex]!)),
    ).toEqual([]);
    const fox = OBJECTS.findIndex(({ name }) => name === 'fox');
    expect(pairs.filter(({ objectIndex }) => objectIndex === fox).map(({ styleIndex }) => STYLES[styleIndex])).toEqual([
      'gradient',
      'flat',
      'noto',
    ]);
  });
});

describe('the sheet', () => {
  it('has 64 different prompts, two full rows for each style, all held-out pairs among them', () => {
    expect(new Set(SHEET.map((entry) => canonicalPrompt(entry.object, entry.style, entry.background))).size).toBe(64);
    expect(STYLES.map((style) => SHEET.filter((entry) => entry.style === style).length)).toEqual(
      STYLES.map(() => 2 * SHEET_COLUMNS),
    );
    expect(SHEET.filter((entry) => entry.heldOut)).toHaveLength(16);
    expect(new Set(SHEET.map((entry) => entry.objectIndex)).size).toBe(64);
  });

  it('uses every background four to seven times', () => {
    for (const background of BACKGROUNDS) {
      const uses = SHEET.filter((entry) => entry.background === background).length;
      expect(uses, background.name).toBeGreaterThanOrEqual(4);
      expect(uses, background.name).toBeLessThanOrEqual(7);
    }
  });
});
