"""Clinical reasoning: health records as one table of events, laboratory results with what they mean, and dialogues.

Research software; not a medical device; not for diagnosis or treatment.

Records of hospitals (loaders) and generated patients become one table (events); a result becomes normal, abnormal or
unknown (reference); a subject's history becomes a dialogue in which tests are asked for and a diagnosis is given
(dialogue), in the manner of DiaLLM (arXiv 2506.20059), whose published definitions are kept and whose other choices are
ours. Nothing here makes a network call, and no error or log holds a value of a record.
"""
