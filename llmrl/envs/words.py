"""Common English words of five letters, written down for this project."""

_TEXT = """
about above actor admit adult after again agent agree ahead alarm album alive alone along angel anger angle angry apart
apple apply arena argue arise armor arrow aside asset avoid award awake aware badge baker basic beach beard beast begin
being below bench berry birth black blade blame blank blend bless blind block blood bloom board boast bonus boost bored
bound brain brake brand brave bread break breed brick bride brief bring broad broom brown brush build bunch cabin cable
candy canoe cargo carry carve catch cause chain chair chalk charm chart chase cheap check cheek cheer chess chest chief
child chill choir claim class clean clear clerk click cliff climb clock close cloth cloud coach coast color couch could
count court cover crack craft crane crash cream creek crime crisp cross crowd crown cruel crush curve cycle daily dairy
dance death decay delay dense depth devil diary dirty ditch dizzy dodge donor doubt dough draft drain drama dream dress
dried drift drill drink drive eager eagle early earth eight elbow elder elect empty enemy enjoy enter equal error essay
event every exact exist extra fable faith false fancy favor feast fence fever fiber field fiery fifth fight final first
flame flash fleet flesh float flock flood floor flour fluid focus force forge forty found frame fresh front frost fruit
funny ghost giant given glass globe glory glove grace grade grain grand grant grape grass grave great green greet grief
group guard guess guest guide habit happy harsh heart heavy hello hobby honey honor horse hotel house human humor hurry
ideal image index inner input issue ivory jewel joint judge juice kneel knife knock label labor large laser later laugh
layer learn leave lemon level lever light limit liver lobby local logic loose lower loyal lucky lunch magic major maker
maple march match mayor medal melon mercy merge merit merry metal meter might minor model money month moral motor mount
mouse mouth movie music nerve never night noble noise north novel nurse ocean offer often olive onion orbit order other
ought outer owner paint panel panic paper party paste patch pause peace pearl phone photo piano piece pilot pinch pitch
place plain plane plant plate plaza point porch pound power press price pride prime print prize proof proud pulse punch
pupil puppy purse queen quest quick quiet quilt quite quote radio raise ranch range rapid ratio reach ready realm rebel
relax reply rider ridge rifle right rigid rival river roast robin robot rough round route royal rumor rural salad sauce
scale scare scene scent scoop scope score scout screw sense serve seven shade shake shape share sharp sheep sheet shelf
shell shine shirt shock shoot shore short shout sight skill skirt sleep slice slide slope small smart smell smile
smoke snake solar solid solve sound south space spare spark speak speed spell spend spice spike spoon sport spray squad
stack staff stage stair stamp stand stare start state steam steel steep stick still stock stone stool store storm story
stove strap straw strip study style sugar sunny sweep sweet swift swing sword table taste teach thank theme thick thief
thing think third those three throw thumb tiger tight title toast today tooth topic torch total touch tough towel tower
toxic trace track trade trail train treat trend trial tribe trick truck truly trust truth twice twist uncle under union
unite until upper upset urban usage usual valid value vapor video virus visit vital vivid voice wagon waste watch water
weary weigh wheat wheel where which while white whole width witch woman world worry worth wound write wrong yacht yield
young youth zebra
"""
WORDS = tuple(_TEXT.split())
