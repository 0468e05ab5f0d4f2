/**
 * What training never sees, and the sheet of prompts by which a trained model is judged.
 *
 * Sixteen pairs of an object and a style are left out of every stage of training (autoencoder, text encoders,
 * transformer), on every background and at every size. Each of their objects is seen in the three other styles, and
 * each style with all the other objects, so that drawing such a pair takes putting the two together. Pairs differ in
 * difficulty: 3d, gradient and flat pictures of an object mostly share their outline, Noto's are drawn differently (its
 * four were chosen among those that `nearest.ts` recognises from the other styles).
 */
import { BACKGROUNDS, type Background } from './captions.ts';
import { OBJECTS, type PictureObject } from './objects.ts';
import { STYLES, type Style } from './pictures.ts';

/** For each style, the objects that training doesn't see in it: an animal, a food or plant, and two things. */
export const HELD_OUT: Readonly<Record<Style, readonly string[]>> = {
  '3d': ['fox', 'strawberry', 'rocket', 'guitar'],
  gradient: ['owl', 'pizza', 'sailboat', 'crown'],
  flat: ['penguin', 'cactus', 'house', 'teddy bear'],
  noto: ['frog', 'banana', 'umbrella', 'violin'],
};

/** True where training must not see this object in this style. */
export function isHeldOut(object: PictureObject, style: Style): boolean {
  return HELD_OUT[style].includes(object.name);
}

/** Indices into the list of objects (`OBJECTS`) and `STYLES`. */
export interface Pair {
  readonly objectIndex: number;
  readonly styleIndex: number;
}

/** Every pair that training may see, in order of objects, then styles. */
export function trainingPairs(objects: readonly PictureObject[] = OBJECTS): Pair[] {
  return objects.flatMap((object, objectIndex) =>
    STYLES.flatMap((style, styleIndex) => (isHeldOut(object, style) ? [] : [{ objectIndex, styleIndex }])),
  );
}

/** One picture of the sheet. */
export interface SheetEntry extends Pair {
  readonly object: PictureObject;
  readonly style: Style;
  readonly background: Background;
  /** Training never saw this object in this style. */
  readonly heldOut: boolean;
}

/** Columns of the sheet: two rows for each style. */
export const SHEET_COLUMNS = 8;

/** Object and background of each picture; no object twice, every background between four and seven times. */
const SHEET_TABLE: Readonly<Record<Style, readonly (readonly [object: string, background: string])[]>> = {
  '3d': [
    ['fox', 'teal'],
    ['lion', 'blue'],
    ['octopus', 'yellow'],
    ['strawberry', 'white'],
    ['turtle', 'pink'],
    ['doughnut', 'purple'],
    ['avocado', 'orange'],
    ['ice cream', 'brown'],
    ['car', 'gray'],
    ['rocket', 'black'],
    ['castle', 'green'],
    ['pumpkin', 'black'],
    ['star', 'red'],
    ['gift', 'teal'],
    ['guitar', 'gray'],
    ['robot', 'orange'],
  ],
  gradient: [
    ['elephant', 'pink'],
    ['owl', 'blue'],
    ['butterfly', 'white'],
    ['dolphin', 'yellow'],
    ['watermelon', 'brown'],
    ['pizza', 'green'],
    ['cupcake', 'teal'],
    ['grapes', 'white'],
    ['sailboat', 'pink'],
    ['airplane', 'orange'],
    ['volcano', 'gray'],
    ['heart', 'black'],
    ['crown', 'purple'],
    ['trophy', 'blue'],
    ['rainbow', 'black'],
    ['key', 'red'],
  ],
  flat: [
    ['koala', 'green'],
    ['flamingo', 'black'],
    ['penguin', 'orange'],
    ['whale', 'white'],
    ['sunflower', 'purple'],
    ['carrot', 'blue'],
    ['cherries', 'gray'],
    ['cactus', 'pink'],
    ['house', 'yellow'],
    ['train', 'white'],
    ['mountain', 'red'],
    ['bicycle', 'green'],
    ['teddy bear', 'teal'],
    ['drum', 'brown'],
    ['camera', 'red'],
    ['scissors', 'yellow'],
  ],
  noto: [
    ['tiger', 'teal'],
    ['frog', 'purple'],
    ['monkey', 'pink'],
    ['bee', 'gray'],
    ['banana', 'brown'],
    ['mushroom', 'blue'],
    ['hamburger', 'teal'],
    ['pineapple', 'red'],
    ['helicopter', 'purple'],
    ['snowman', 'blue'],
    ['umbrella', 'yellow'],
    ['soccer ball', 'green'],
    ['light bulb', 'black'],
    ['top hat', 'orange'],
    ['violin', 'white'],
    ['ghost', 'purple'],
  ],
};

/** The 64 pictures of the sheet, row by row; sixteen of them held out. */
export const SHEET: readonly SheetEntry[] = STYLES.flatMap((style, styleIndex) =>
  SHEET_TABLE[style].map(([objectName, backgroundName]) => {
    const objectIndex = OBJECTS.findIndex(({ name }) => name === objectName);
    const background = BACKGROUNDS.find(({ name }) => name === backgroundName);
    const object = OBJECTS[objectIndex];
    if (object === undefined || background === undefined) {
      throw new Error(`The sheet asks for ${objectName} on ${backgroundName}, which the lists do not have.`);
    }
    return { object, objectIndex, style, styleIndex, background, heldOut: isHeldOut(object, style) };
  }),
);
